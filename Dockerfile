# `shoal serve` in a container. docs/deploy.md explains the arguments; TORCH_INDEX decides between CPU and CUDA.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim AS build

# The CPU kernel is compiled when the package is installed.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/shoal
ENV PATH=/opt/shoal/bin:$PATH
WORKDIR /src
COPY pyproject.toml constraints.txt hatch_build.py README.md LICENSE ./
# torch comes first and alone, so that only torch is looked up in the index, and before the sources, so that a change of ours keeps this layer.
ARG TORCH_INDEX=""
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url $TORCH_INDEX} --no-deps "$(grep '^torch==' constraints.txt)"
COPY src src
RUN pip install --no-cache-dir --constraint constraints.txt ".[serve]"

FROM python:${PYTHON}-slim
# The kernel takes its threads from the OpenMP runtime that comes with torch.
COPY --from=build /opt/shoal /opt/shoal
RUN useradd --create-home --uid 10001 shoal
USER shoal
WORKDIR /home/shoal
ENV PATH=/opt/shoal/bin:$PATH HF_HOME=/home/shoal/models PYTHONUNBUFFERED=1
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["shoal", "serve", "--host", "0.0.0.0"]
CMD ["shoal-e2e"]
