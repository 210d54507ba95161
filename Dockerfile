# syntax=docker/dockerfile:1
# One image for the head, for workers with and without GPUs, and for a machine without internet.
#
#     docker build -t transcribe .
#     docker run --rm transcribe                                      the smoke command: versions, weights, disk
#     docker run --rm -v /data:/data transcribe transcribe run /data/calls /data/out
#     docker run --rm --gpus all ...                                  with a GPU (driver 580 or later)
#
# CUDA's libraries come with PyTorch's wheels; of the machine only the driver is used.

ARG PYTHON=3.11.14-slim-bookworm

# ---- build: the environment, from the same lock as everywhere -----------------------------
FROM python:${PYTHON} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/transcribe
WORKDIR /src
COPY requirements.lock ./
# The lock names every package of tests and demo too; the image takes what its users need.
COPY pyproject.toml README.md ./
COPY transcribe ./transcribe
COPY jobs ./jobs
COPY cluster ./cluster
RUN /opt/transcribe/bin/python -m pip install --quiet --constraint requirements.lock ".[score,cluster]"

# ---- run ----------------------------------------------------------------------------------
FROM python:${PYTHON} AS run
# What `ray up` needs inside of the container: rsync for its file mounts.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends rsync=3.2.7-* \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 --shell /bin/bash ray
COPY --from=build /opt/transcribe /opt/transcribe
ENV PATH=/opt/transcribe/bin:$PATH PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
USER 1000
WORKDIR /home/ray
# A hub model can be put into the image, instead of being fetched by every machine:
#     docker build --build-arg PREFETCH=openai/whisper-large-v3-turbo -t transcribe:turbo .
# Weights in a directory are mounted: -v /models:/models ... --model /models/my-whisper
ARG PREFETCH=whisper-base
RUN python -c "import sys; from transcribe.models import resolve; print(resolve(sys.argv[1]))" \
    "$PREFETCH"
CMD ["transcribe", "preflight", "local"]
