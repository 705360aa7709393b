"use strict";
// Draws the charts of a frontier from the numbers in #data. Texts become nodes, never markup.

const data = JSON.parse(document.getElementById("data").textContent);
const COLOURS = 8;
const SHAPES = [
  "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0z", // circle
  "M-4.5,-4.5h9v9h-9z", // square
  "M0,-5.5l5.5,10h-11z", // triangle
  "M0,-6l6,6l-6,6l-6,-6z", // diamond
  "M-5.5,-4.5h11l-5.5,10z", // triangle, point down
];

function node(tag, attributes, ...children) {
  const svg = ["svg", "g", "path", "line", "rect", "text"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// Round numbers between low and high, about as many as asked for: ticks(0.2, 1, 4) is 0.2, 0.4, 0.6, 0.8, 1.
function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find(factor => factor * power >= rough) || 10);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(k * step);
  return { values: found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

function fixed(value, digits) {
  return value.toFixed(digits).replace("-", "−");
}

// One chart. spec: lines [{name, series, points [{x, y, low?, high?, tip}]}], x {title, write, labels?}, y {title}, dense [y, low, high]?
function draw(figure, spec) {
  const plot = figure.querySelector(".plot"), width = plot.clientWidth, height = Math.round(Math.min(440, Math.max(280, width * 0.5)));
  const shown = spec.lines.filter(line => !figure.hiddenSeries.has(line.series) && line.points.length);
  const all = shown.flatMap(line => line.points);
  plot.replaceChildren();
  if (!all.length) return void plot.append(node("p", {}, "Nothing to draw."));

  const ys = all.flatMap(p => [p.low ?? p.y, p.high ?? p.y]).concat(spec.dense ?? []), xs = all.map(p => p.x);
  const padded = (values, share) => {
    const low = Math.min(...values), high = Math.max(...values), pad = (high - low) * share || Math.abs(high) * 0.05 || 1;
    return [low - pad, high + pad];
  };
  const [y0, y1] = padded(ys, 0.06), [x0, x1] = spec.x.labels ? [-0.5, spec.x.labels.length - 0.5] : padded(xs, 0.04);
  const yTicks = ticks(y0, y1, 5), room = { left: 16 + 8 * Math.max(...yTicks.values.map(v => fixed(v, yTicks.digits).length)), right: 8, top: 24, bottom: 44 };
  const x = value => room.left + (value - x0) / (x1 - x0) * (width - room.left - room.right);
  const y = value => height - room.bottom - (value - y0) / (y1 - y0) * (height - room.top - room.bottom);
  const svg = node("svg", { width, height, role: "img", "aria-label": `${spec.y.title} against ${spec.x.title}` });

  for (const value of yTicks.values) {
    svg.append(node("line", { class: "grid", x1: room.left, x2: width - room.right, y1: y(value), y2: y(value) }));
    svg.append(node("text", { x: room.left - 6, y: y(value) + 4, "text-anchor": "end" }, fixed(value, yTicks.digits)));
  }
  const slot = (width - room.left - room.right) / (spec.x.labels?.length || 1);
  const xTicks = spec.x.labels ? spec.x.labels.map((label, k) => [k, clip(label, slot)])
    : ticks(x0, x1, width / 80).values.map(value => [value, spec.x.write(value)]);
  for (const [value, label] of xTicks) svg.append(node("text", { x: x(value), y: height - room.bottom + 18, "text-anchor": "middle" }, label));
  svg.append(node("text", { x: room.left, y: 12 }, clip(spec.y.title, width - room.left)));
  svg.append(node("text", { x: width - room.right, y: height - 8, "text-anchor": "end" }, clip(spec.x.title, width - 16)));
  if (spec.dense) {
    const [value, low, high] = spec.dense;
    svg.append(node("rect", { class: "dense-band", x: room.left, width: width - room.left - room.right, y: y(high), height: Math.max(0, y(low) - y(high)) }));
    svg.append(node("line", { class: "dense-line", x1: room.left, x2: width - room.right, y1: y(value), y2: y(value) }));
  }

  const marks = [];
  for (const line of shown) {
    const group = node("g", { class: `s${line.series % COLOURS}` });
    const path = line.points.map((p, k) => `${k ? "L" : "M"}${x(p.x).toFixed(1)},${y(p.y).toFixed(1)}`).join("");
    group.append(node("path", { class: "line", d: path }));
    for (const p of line.points) {
      if (p.low !== undefined) group.append(node("line", { class: "interval", x1: x(p.x), x2: x(p.x), y1: y(p.low), y2: y(p.high) }));
    }
    const few = line.points.length <= 24;
    for (const p of line.points) {
      const mark = node("path", {
        class: "mark", d: SHAPES[line.series % SHAPES.length], transform: `translate(${x(p.x).toFixed(1)},${y(p.y).toFixed(1)}) scale(${few ? 1 : 0.5})`,
        ...(few && { tabindex: 0, role: "img", "aria-label": p.tip.join(", ") }),
      });
      marks.push({ mark, tip: p.tip, x: x(p.x), y: y(p.y) });
      group.append(mark);
    }
    svg.append(group);
  }
  const tip = node("div", { class: "tip", hidden: "" });
  const show = found => {
    for (const { mark } of marks) mark.classList.toggle("on", mark === found?.mark);
    tip.hidden = !found;
    if (!found) return;
    tip.replaceChildren(...found.tip.map((text, k) => node(k ? "span" : "b", {}, text)));
    tip.style.left = `${Math.max(0, Math.min(found.x + 12, width - tip.offsetWidth))}px`;
    tip.style.top = `${found.y - tip.offsetHeight - 12 < 0 ? found.y + 14 : found.y - tip.offsetHeight - 12}px`;
  };
  const nearest = event => {
    const box = svg.getBoundingClientRect(), distance = m => Math.hypot(m.x - (event.clientX - box.left), m.y - (event.clientY - box.top));
    const best = marks.reduce((a, b) => distance(b) < distance(a) ? b : a);
    show(distance(best) < 40 ? best : null);
  };
  svg.addEventListener("pointermove", nearest);
  svg.addEventListener("pointerdown", nearest);
  svg.addEventListener("pointerleave", event => event.pointerType === "mouse" && show(null));
  for (const m of marks) m.mark.addEventListener("focus", () => show(m));
  plot.append(svg, tip);
}

function clip(text, room) {
  const letters = Math.max(3, Math.floor(room / 6.5));
  return text.length > letters ? text.slice(0, letters - 1) + "…" : text;
}

function legend(figure, series, redraw) {
  figure.querySelector(".legend").replaceChildren(...series.map(index => {
    const shape = node("path", { class: "mark", d: SHAPES[index % SHAPES.length], transform: "translate(7,7)" });
    const button = node("button", { type: "button", "aria-pressed": !figure.hiddenSeries.has(index) },
      node("svg", { width: 14, height: 14, class: `s${index % COLOURS}`, "aria-hidden": "true" }, shape), data.series[index]);
    button.addEventListener("click", () => {
      if (!figure.hiddenSeries.delete(index)) figure.hiddenSeries.add(index);
      button.setAttribute("aria-pressed", !figure.hiddenSeries.has(index));
      redraw();
    });
    return button;
  }));
}

// A figure whose spec depends on what its selects say. choices: {name of select: [[value, label], ...]}
function chart(id, choices, specify) {
  const figure = document.getElementById(id);
  if (!figure) return;
  figure.hiddenSeries = new Set();
  const chosen = {};
  const redraw = () => draw(figure, specify(chosen, figure));
  for (const [name, options] of Object.entries(choices)) {
    const select = figure.querySelector(`[data-choice=${name}]`);
    select.replaceChildren(...options.map(([, label], k) => node("option", { value: k }, label)));
    select.closest("label").hidden = options.length < 2;
    chosen[name] = options[0]?.[0];
    select.addEventListener("change", () => { chosen[name] = options[select.value][0]; redraw(); });
  }
  legend(figure, [...new Set(data.arms.map(arm => arm.series))], redraw);
  let width = 0;
  new ResizeObserver(() => requestAnimationFrame(() => {
    const now = figure.querySelector(".plot").clientWidth;
    if (now !== width) { width = now; redraw(); }
  })).observe(figure);
}

const percent = share => `${Math.round(100 * share)}%`;
const scoreText = (metric, [value, low, high]) =>
  `${metric.label} ${fixed(value, metric.digits)} (${fixed(low, metric.digits)} to ${fixed(high, metric.digits)})`;
const metrics = data.metrics.map(metric => [metric, `${metric.label} (${metric.higher ? "higher" : "lower"} is better)`]);
const measured = data.costs.filter(cost => data.arms.some(arm => cost.name in arm.costs));
const depths = data.depths.length ? data.depths : [[1, "every layer"]];
const at = depth => data.arms.filter(arm => arm.dense || arm.depth === depth);
measured.sort((a, b) => (b.name === "decode.flops") - (a.name === "decode.flops")); // every model has these

chart("frontier", { metric: metrics, cost: measured.map(cost => [cost, cost.label]) }, ({ metric, cost }, figure) => {
  const drawn = data.arms.filter(arm => cost && cost.name in arm.costs && metric.name in arm.scores);
  const lines = data.series.map((name, series) => ({
    name, series,
    points: drawn.filter(arm => arm.series === series).map(arm => {
      const score = arm.scores[metric.name], share = arm.costs[cost.name];
      const tip = [arm.name, arm.layers, scoreText(metric, score), `${cost.label}: ${percent(share)}`];
      return { x: share, y: score[0], low: score[1], high: score[2], tip };
    }).sort((a, b) => a.x - b.x),
  }));
  const absent = data.arms.filter(arm => !drawn.includes(arm)).map(arm => arm.name);
  figure.querySelector(".absent").textContent = absent.length ? `Not in this chart (not measured, or in another unit): ${absent.join(", ")}.` : "";
  const dense = drawn.find(arm => arm.reference)?.scores[metric.name];
  return { lines, dense, x: { title: `${cost?.label}, share of dense`, write: percent }, y: { title: metric.label } };
});

chart("positions", { depth: depths }, ({ depth }) => ({
  lines: at(depth).map(arm => ({
    name: arm.name, series: arm.series,
    points: arm.losses.map(([position, loss, count]) => (
      { x: position, y: loss, tip: [arm.name, `position ${position}: ${fixed(loss, 3)} nats`, `mean of ${count} completions`] })),
  })),
  x: { title: "position in the completion", write: value => Number.isInteger(value) && value >= 0 ? String(value) : "" }, y: { title: "loss, nats" },
}));

chart("lengths", { metric: metrics, depth: depths }, ({ metric, depth }) => {
  const arms = at(depth);
  return {
    lines: arms.map((arm, k) => ({
      name: arm.name, series: arm.series,
      points: data.bands.map((band, x) => [band, x]).filter(([band]) => arm.lengths[band]?.[metric.name]).map(([band, x]) => {
        const score = arm.lengths[band][metric.name], aside = (k - (arms.length - 1) / 2) * Math.min(0.06, 0.6 / arms.length);
        return { x: x + aside, y: score[0], low: score[1], high: score[2], tip: [arm.name, band, scoreText(metric, score)] };
      }),
    })),
    x: { title: "length of the reference", labels: data.bands }, y: { title: metric.label },
  };
});
