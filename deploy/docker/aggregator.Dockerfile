# The aggregator, and the operators' command line `shelora`. Neither an HE library nor a training library is in this image, nor
# any of our code that could decrypt.
#   docker build -f deploy/docker/aggregator.Dockerfile -t shelora/aggregator .
ARG PYTHON_IMAGE=python:3.12-slim-trixie

FROM ${PYTHON_IMAGE} AS packages
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends tini \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
 && useradd --uid 10001 --no-log-init --home-dir /var/lib/shelora --shell /usr/sbin/nologin --user-group shelora \
 && install -d -o shelora -g shelora -m 0700 /var/lib/shelora /etc/shelora/enrolment
WORKDIR /build
COPY deploy/docker/install.sh ./
COPY requirements/bootstrap.txt requirements/aggregator.txt requirements/
RUN ./install.sh packages aggregator

FROM packages AS product
COPY pyproject.toml README.md LICENSE ./
COPY shelora shelora
COPY services services
RUN ./install.sh product services/aggregator services/operators

FROM packages
COPY --from=product /opt/product /opt/shelora
# Linear algebra would start a thread for every core of the host, and use none of them.
ENV PATH=/opt/shelora/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    OPENBLAS_NUM_THREADS=1
USER 10001:10001
WORKDIR /var/lib/shelora
VOLUME /var/lib/shelora
EXPOSE 7443 7480
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=60s --retries=3 \
  CMD ["python", "-m", "services.common.probe", "http://127.0.0.1:7480/readyz"]
ENTRYPOINT ["tini", "--", "shelora-aggregator"]
CMD ["serve", "--config", "/etc/shelora/aggregator.yaml"]
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="shelora aggregator" \
      org.opencontainers.image.description="Averages LoRA adapters that it cannot decrypt" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
