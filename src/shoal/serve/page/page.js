// The page of `shoal serve`: it asks the server's own HTTP API and draws what comes back. Texts become nodes, never markup.

const $ = id => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
let model; // what v1/models says of the model: {id, shoal: {num_layers, ...}}
let running = null; // the AbortController of a run in progress

function node(tag, content = "", properties = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...[content].flat());
  return made;
}

// --- The server -------------------------------------------------------------------------------------------------------

async function call(path, { body, signal } = {}) {
  const key = sessionStorage.getItem("shoal-key");
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal })
    .catch(orElse("The server cannot be reached."));
  if (response.ok) return response;
  if (response.status === 401) $("key-form").hidden = false;
  const answer = await response.json().catch(() => null);
  throw new Error(answer?.error?.message ?? `The server answered ${response.status} ${response.statusText}`.trim() + ".");
}

// A browser's words for a failed request differ and say little: ours instead, except where we cancelled it ourselves.
function orElse(message) {
  return error => { throw error.name === "AbortError" ? error : new Error(message); };
}

// The JSON of each server-sent event up to [DONE].
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const cut = "The connection broke off before the answer was complete.";
  for (let rest = ""; ;) {
    const { value, done } = await reader.read().catch(orElse(cut));
    if (done) throw new Error(cut);
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.map(one => one.trimEnd())) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice("data: ".length));
    }
  }
}

function inChat() {
  return $("endpoint").value === "chat";
}

function requested(depth) {
  const most = $("max-tokens").valueAsNumber, prompt = $("prompt").value;
  return {
    model: model.id, depth, draft: $("draft").value, temperature: $("temperature").valueAsNumber, seed: $("seed").valueAsNumber,
    ...(inChat() ? { messages: [{ role: "user", content: prompt }], max_completion_tokens: most } : { prompt, max_tokens: most }),
  };
}

// --- Numbers ----------------------------------------------------------------------------------------------------------

function fixed(value, digits) {
  return value.toFixed(digits).replace("-", "−");
}

// Three digits and a unit: short(1234567) is "1.23 M".
function short(value) {
  let power = 0;
  for (; Number(value.toPrecision(3)) >= 1000; value /= 1000) power++;
  return power ? `${value.toPrecision(3)} ${"kMGTPE"[power - 1]}` : String(value);
}

// saving(25, 75) is ["25%", "fewer"]; drafting may take more than it saves: saving(-5, 105) is ["5%", "more"].
function saving(saved, used) {
  return [`${fixed(Math.abs(100 * saved / (saved + used)), 0)}%`, saved < 0 ? "more" : "fewer"];
}

function tint(element, layers) {
  element.style.setProperty("--share", layers / model.shoal.num_layers);
  return element;
}

// --- A depth and its forecast -----------------------------------------------------------------------------------------

const panels = ["A", "B"].map(letter => {
  const [setting, result] = ["setting", "result"].map(id => $(id).content.firstElementChild.cloneNode(true));
  setting.querySelector(".letter").textContent = letter;
  $("settings").append(setting);
  $("outputs").append(result);
  const text = result.querySelector(".text"), inspected = result.querySelector(".inspected");
  text.addEventListener("keydown", event => inspectNext(text, inspected, event));
  text.addEventListener("pointerover", event => inspect(event.target.closest(".token"), inspected));
  return { letter, setting, result, text, inspected, slider: setting.querySelector("input"), run: null, forecast: null };
});

function shown() {
  return $("compare").checked ? panels : panels.slice(0, 1);
}

// A slider moves in percent; 33% stands for the tuned depth 1/3 where there is one.
function depthOf(panel) {
  const percent = panel.slider.valueAsNumber;
  return model.shoal.tuned_depths?.find(depth => Math.round(100 * depth) === percent) ?? percent / 100;
}

function showDepth(panel) {
  const depth = depthOf(panel), layers = `about ${Math.round(depth * model.shoal.num_layers)} of ${model.shoal.num_layers} layers`;
  panel.setting.querySelector("output").replaceChildren(node("b", fixed(depth, 2)), `, ${layers}`);
  panel.slider.setAttribute("aria-valuetext", `${fixed(depth, 2)}, ${layers}`);
}

async function showForecast(panel) {
  panel.forecast?.abort();
  const { signal } = panel.forecast = new AbortController();
  const note = panel.setting.querySelector(".forecast"), bars = panel.setting.querySelector(".bars");
  try {
    await new Promise(resolve => setTimeout(resolve, 250));
    signal.throwIfAborted();
    if (!$("ask").checkValidity()) throw new Error("A field needs another value.");
    const plan = await (await call("v1/plan", { body: requested(depthOf(panel)), signal })).json();
    const [share, fewer] = saving(plan.dense_flops - plan.flops, plan.flops);
    drawBars(bars, plan.layers);
    note.textContent = `Forecast: ${fixed(plan.mean_layers, 1)} of ${plan.num_layers} layers per token, ${share} ${fewer} FLOPs, `
      + `should all ${plan.max_tokens} tokens be generated.`;
  } catch (error) {
    if (error.name === "AbortError") return;
    bars.replaceChildren();
    note.textContent = `No forecast. ${error.message}`;
  }
}

// A bar per token as high as its layers; neighbours of one height are one rectangle.
function drawBars(svg, layers) {
  svg.setAttribute("viewBox", `0 0 ${layers.length} ${model.shoal.num_layers}`);
  svg.setAttribute("aria-label", `Layers per token: ${layers[0]} for the first, ${layers.at(-1)} for the last`);
  svg.replaceChildren();
  for (let from = 0, to; from < layers.length; from = to) {
    for (to = from; layers[to] === layers[from]; to++);
    const bar = document.createElementNS(SVG, "rect");
    const box = { x: from, width: to - from, y: model.shoal.num_layers - layers[from], height: layers[from] };
    for (const [name, value] of Object.entries(box)) bar.setAttribute(name, value);
    svg.append(bar);
  }
}

// --- A run ------------------------------------------------------------------------------------------------------------

// All that a run needs is read from the form before the first one starts.
function prepareRun(panel) {
  const depth = depthOf(panel), path = inChat() ? "v1/chat/completions" : "v1/completions";
  const body = { ...requested(depth), stream: true, stream_options: { include_usage: true, include_layers: true } };
  return { depth, path, body, ids: [], tokens: [], usage: null, finish: null };
}

// Tokens without a text of their own (half a character, an end mark) wait for the text that follows them.
async function generate(panel, signal) {
  const { run } = panel;
  let waiting = [];
  panel.result.classList.add("running");
  try {
    for await (const event of events(await call(run.path, { body: run.body, signal }))) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0], text = choice?.text ?? choice?.delta?.content;
      run.usage = event.usage ?? run.usage;
      run.finish = choice?.finish_reason ?? run.finish;
      run.ids.push(...event.shoal?.token_ids ?? []);
      waiting.push(...event.shoal?.layers ?? []);
      if (text) showToken(panel, text, waiting.splice(0));
    }
    if (waiting.length) showToken(panel, "", waiting);
  } finally {
    panel.result.classList.remove("running");
  }
}

// A span for the text of one event, and that of several tokens where drafts were accepted. run.tokens: a span per token.
function showToken(panel, text, layers) {
  const { tokens } = panel.run, of = `of ${model.shoal.num_layers} layers`, from = tokens.length + 1;
  const mean = layers.reduce((sum, one) => sum + one, 0) / (layers.length || 1);
  const title = layers.length === 1 ? `token ${from}, ${layers[0]} ${of}`
    : layers.length ? `tokens ${from} to ${from + layers.length - 1}, ${layers.join(", ")} ${of}` : "text held back from the tokens before";
  const span = tint(node("span", text, { className: "token", title }), mean);
  tokens.push(...layers.map(() => span));
  panel.text.append(span);
}

function inspect(token, inspected) {
  if (token) inspected.textContent = `“${token.textContent}”: ${token.title}`;
}

// Arrows walk over the tokens, for whoever has no pointer.
function inspectNext(text, inspected, event) {
  const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
  if (!step) return;
  event.preventDefault();
  const at = text.querySelector(".on"), next = at ? at[step] : text.firstElementChild;
  if (!next) return;
  at?.classList.remove("on");
  next.classList.add("on");
  inspect(next, inspected);
}

async function runAll() {
  if (running) return;
  const chosen = shown(), together = $("together").checked;
  running = new AbortController();
  prepare(chosen);
  try {
    if (together) await Promise.all(chosen.map(panel => generate(panel, running.signal)));
    else for (const panel of chosen) await generate(panel, running.signal);
    $("status").textContent = chosen.map(({ run }) => finished(run)).join(" ");
    if (chosen.length === 2) showDifference(...chosen.map(panel => panel.run), together);
  } catch (error) {
    const stopped = error.name === "AbortError", count = chosen.map(({ run }) => run.tokens.length).join(" and ");
    $("status").textContent = `${stopped ? "Stopped" : "Broken off"} after ${count} tokens.`;
    if (!stopped) $("alert").textContent = error.message;
  } finally {
    running.abort();
    running = null;
    showCosts(chosen);
    setBusy(false);
  }
}

function prepare(chosen) {
  setBusy(true);
  $("alert").textContent = $("difference").textContent = $("clock").textContent = "";
  $("status").textContent = "Generating…";
  $("results").hidden = false;
  $("results").classList.toggle("comparing", chosen.length === 2);
  $("costs").hidden = true;
  panels[1].result.hidden = chosen.length === 1;
  for (const panel of chosen) {
    panel.run = prepareRun(panel);
    const name = `Depth ${fixed(panel.run.depth, 2)}`;
    panel.result.querySelector("h2").replaceChildren(node("span", panel.letter, { className: "letter" }), name);
    panel.text.setAttribute("aria-label", `Output at ${name}. Left and right arrows tell the layers of each token.`);
    for (const part of [panel.text, panel.inspected, panel.result.querySelector(".saved")]) part.replaceChildren();
  }
}

// Stop gives its focus back before it is switched off, or the keyboard would start over at the top of the page.
function setBusy(busy) {
  if (!busy && document.activeElement === $("stop")) $("generate").focus();
  $("generate").setAttribute("aria-disabled", busy);
  $("stop").disabled = !busy;
}

function finished(run) {
  const why = { stop: "ended by the model", length: "as many as asked for" }[run.finish] ?? run.finish;
  return `Depth ${fixed(run.depth, 2)}: ${run.tokens.length} tokens, ${why}.`;
}

// --- What it took -----------------------------------------------------------------------------------------------------

function showCosts(chosen) {
  const done = chosen.filter(panel => panel.run.usage);
  for (const { run: { usage }, result } of done) {
    const cost = usage.shoal;
    const facts = [[fixed(cost.mean_layers, 1), `of ${cost.layers} layers per token`]];
    for (const [saved, used, unit] of [[cost.layer_tokens_saved, cost.layer_tokens, "layer-tokens"], [cost.flops_saved, cost.flops, "FLOPs"]]) {
      const [share, fewer] = saving(saved, used);
      facts.push([share, `${fewer} ${unit}`]);
    }
    result.querySelector(".saved").replaceChildren(...facts.map(([value, label]) => node("li", [node("b", value), label])));
  }
  $("costs").hidden = !done.length;
  const columns = done.map(({ run, letter }) => node("th", [node("span", letter, { className: "letter" }), `Depth ${fixed(run.depth, 2)}`], { scope: "col" }));
  $("costs").tHead.rows[0].replaceChildren($("costs").tHead.rows[0].cells[0], ...columns);
  $("costs").tBodies[0].replaceChildren(...Object.entries(COSTS).map(([label, write]) =>
    node("tr", [node("th", label, { scope: "row" }), ...done.map(({ run }) => node("td", write(run.usage, run.usage.shoal)))])));
}

const COSTS = {
  "Mean layers": (usage, cost) => `${fixed(cost.mean_layers, 2)} of ${cost.layers}`,
  "Layer-tokens": (usage, cost) => withSaving(cost.layer_tokens, cost.layer_tokens_saved),
  "FLOPs": (usage, cost) => withSaving(cost.flops, cost.flops_saved),
  "Prompt tokens": usage => String(usage.prompt_tokens),
  "Generated tokens": usage => String(usage.completion_tokens),
  "Seconds on the server": (usage, cost) => fixed(cost.seconds, 2),
  "Tokens per second": (usage, cost) => fixed(usage.completion_tokens / cost.seconds, 1),
  "Drafts accepted": (usage, { draft }) => draft ? `${draft.accepted} of ${draft.drafted}` : "no drafting",
};

function withSaving(used, saved) {
  return [short(used), node("small", saving(saved, used).join(" "))];
}

// --- Two runs ---------------------------------------------------------------------------------------------------------

function showDifference(a, b, together) {
  const at = a.ids.findIndex((id, k) => id !== b.ids[k]), first = at < 0 && b.ids.length > a.ids.length ? a.ids.length : at;
  const clocks = [a, b].map(run => `${fixed(run.usage.shoal.seconds, 2)} s for ${run.usage.completion_tokens} tokens`).join(" against ");
  $("clock").textContent = together ? "Both ran at the same time and shared the machine: their seconds do not compare the depths."
    : `Wall clock of one run each, one after the other: ${clocks}. `
    + `B took ${fixed(b.usage.shoal.seconds / a.usage.shoal.seconds, 2)} times as long as A; repeat the pair before you rely on that.`;
  if (first < 0) return void ($("difference").textContent = `Both depths gave the same ${a.ids.length} tokens.`);
  const alone = unmatched(a.ids, b.ids);
  for (const [k, run] of [a, b].entries()) {
    alone[k].forEach((differs, token) => differs && run.tokens[token]?.classList.add("differs"));
    run.tokens[first]?.classList.add("first");
  }
  const [onlyA, onlyB] = alone.map(flags => flags.filter(Boolean).length);
  $("difference").textContent = `The first difference is token ${first + 1}, in bold. ${a.ids.length - onlyA} tokens are in both, in the same order; `
    + `${onlyA} only in A and ${onlyB} only in B are underlined.`;
}

// Which tokens of a, and of b, are not in their longest common subsequence: of [1, 2, 3] and [1, 3, 4] the 2 and the 4.
function unmatched(a, b) {
  const common = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1)); // [i][j]: of a[i:] and b[j:]
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      common[i][j] = a[i] === b[j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
    }
  }
  const flags = [a, b].map(ids => ids.map(() => true));
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i] === b[j]) flags[0][i++] = flags[1][j++] = false;
    else if (common[i + 1][j] >= common[i][j + 1]) i++;
    else j++;
  }
  return flags;
}

// --- The page ---------------------------------------------------------------------------------------------------------

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = theme === "dark" ? "Light theme" : "Dark theme";
}

// A choice that is also the system's is not kept: the page follows the system again.
function startTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)"), systemTheme = () => system.matches ? "dark" : "light";
  const follow = () => setTheme(localStorage.getItem("shoal-theme") ?? systemTheme());
  system.addEventListener("change", follow);
  $("theme").addEventListener("click", () => {
    const chosen = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    if (chosen === systemTheme()) localStorage.removeItem("shoal-theme");
    else localStorage.setItem("shoal-theme", chosen);
    follow();
  });
  follow();
}

function showModel() {
  const { num_layers: layers, max_positions: positions, max_tokens: most, min_depth: least, tuned_depths: tuned, drafts, chat } = model.shoal;
  const depths = tuned?.map(depth => Number(depth.toFixed(2))) ?? [];
  $("model").textContent = model.id;
  document.title = `${model.id} – Shoal`;
  $("about").textContent = `${layers} layers, ${positions} positions${depths.length ? `, tuned for depths ${depths.join(", ")}` : ""}`;
  $("tuned").replaceChildren(...depths.map(depth => node("option", "", { value: Math.round(100 * depth) })));
  $("draft").append(...drafts.map(name => node("option", name, { value: name })));
  $("endpoint").parentElement.hidden = !chat;
  $("max-tokens").max = most;
  $("max-tokens").value = Math.min(64, most);
  $("legend").setAttribute("aria-label", `Colours of tokens: the more of the ${layers} layers a token used, the stronger its tint`);
  $("legend").replaceChildren("1 layer", ...Array.from({ length: layers }, (_, k) => tint(node("i"), k + 1)), `${layers} layers`);
  for (const [k, panel] of panels.entries()) {
    panel.slider.min = Math.ceil(100 * least);
    panel.slider.value = k ? 100 : 33;
  }
}

function refresh() {
  $("together").parentElement.hidden = !$("compare").checked;
  $("ask").classList.toggle("comparing", $("compare").checked);
  for (const panel of panels) {
    panel.setting.hidden = !shown().includes(panel);
    showDepth(panel);
    if (!panel.setting.hidden) showForecast(panel);
  }
}

// The form sleeps until the model is known: a server with keys tells nothing before it has seen one.
async function start() {
  try {
    model = (await (await call("v1/models")).json()).data[0];
  } catch (error) {
    return void ($("alert").textContent = error.message);
  }
  $("alert").textContent = "";
  $("ask").inert = false;
  showModel();
  refresh();
  $("ask").addEventListener("input", refresh);
  $("ask").addEventListener("submit", event => { event.preventDefault(); runAll(); });
  $("stop").addEventListener("click", () => running?.abort());
  document.addEventListener("keydown", event => {
    if (event.key === "Escape") running?.abort();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
  });
}

$("key-form").addEventListener("submit", event => {
  event.preventDefault();
  sessionStorage.setItem("shoal-key", $("key").value);
  $("key-form").hidden = true;
  if (model) refresh();
  else start();
});
startTheme();
start();
