# The client agent.
#   docker build -f deploy/docker/agent.Dockerfile -t shelora/agent .
#   ... --build-arg TORCH_INDEX=URL     the CPU build of torch from an index that offers one: an image without CUDA, 4 GB smaller
#   ... --build-arg TORCH=cuda          for NVIDIA GPUs: docker run --gpus all
ARG PYTHON_IMAGE=python:3.12-slim-trixie

FROM ${PYTHON_IMAGE} AS packages
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends tini libgomp1 \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
 && useradd --uid 10001 --no-log-init --home-dir /var/lib/shelora --shell /usr/sbin/nologin --user-group shelora \
 && install -d -o shelora -g shelora -m 0700 /var/lib/shelora /etc/shelora/enrolment
WORKDIR /build
COPY deploy/docker/install.sh ./
COPY requirements/bootstrap.txt requirements/agent.txt requirements/
ARG TORCH=cpu
ARG TORCH_INDEX=
RUN ./install.sh packages agent

FROM packages AS product
COPY pyproject.toml README.md LICENSE ./
COPY shelora shelora
COPY services services
RUN ./install.sh product services/client_agent shelora/he/secret

FROM packages
COPY --from=product /opt/product /opt/shelora
ENV PATH=/opt/shelora/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/var/lib/shelora/huggingface \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /var/lib/shelora
VOLUME /var/lib/shelora
EXPOSE 7482
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=60s --retries=3 \
  CMD ["python", "-m", "services.common.probe", "http://127.0.0.1:7482/healthz"]
ENTRYPOINT ["tini", "--", "shelora-agent"]
CMD ["run", "--config", "/etc/shelora/agent.yaml"]
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="shelora client agent" \
      org.opencontainers.image.description="Fine-tunes on a device and takes part in encrypted averages" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
