# Two images that hold preftune and nothing of yours. Mount a directory of yours at /data: runs and caches land there.
#
#   docker build --target cpu -t preftune .
#   docker run --rm -v "$PWD:/data" --user "$(id -u):$(id -g)" preftune run quickstart
#
#   docker build --target cuda -t preftune:cuda .
#   docker run --rm --gpus all -v "$PWD:/data" --user "$(id -u):$(id -g)" preftune:cuda run hh-colab
#
# `make docker-check` executes the steps of both without an engine.

FROM python:3.11-slim AS source
WORKDIR /preftune
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src ./src
ENV PYTHONUNBUFFERED=1 HF_HOME=/data/.cache/huggingface PREFTUNE_CACHE=/data/.cache/preftune

FROM source AS cpu
# The usual index has a torch with CUDA, some gigabytes more: --build-arg TORCH_INDEX=URL names one without.
ARG TORCH_INDEX=""
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
RUN pip install --no-cache-dir -c constraints.txt ".[gguf]"
WORKDIR /data
ENTRYPOINT ["preftune"]
CMD ["--help"]

FROM source AS cuda
# torch's wheel brings the CUDA libraries, the host the driver.
RUN pip install --no-cache-dir -c constraints.txt torch
RUN pip install --no-cache-dir -c constraints.txt ".[gguf]"
WORKDIR /data
ENTRYPOINT ["preftune"]
CMD ["--help"]
