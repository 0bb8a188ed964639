# The last step compiles once what runs compiled, and shows that it works.
# docker build -t flowverify . && docker run --rm flowverify check digits-fc3 --index 0 --radius 0.03
# TORCH may name a build for CPUs, which is much smaller, with PIP_EXTRA_INDEX_URL set to where these are.
FROM python:3.11-slim

ARG TORCH="torch==2.13.0"
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 NUMBA_CACHE_DIR=/var/cache/numba

WORKDIR /src
RUN pip install "$TORCH"
COPY pyproject.toml README.md LICENSE ./
COPY flowverify flowverify
COPY models models
RUN pip install ".[plot,runtime]" \
    && pip install --no-deps auto-LiRPA==0.3 \
    && mkdir -m 777 /var/cache/numba

RUN flowverify check digits-fc3 --index 0 --radius 0.03 && chmod -R a+rwX /var/cache/numba

WORKDIR /data
ENTRYPOINT ["flowverify"]
CMD ["--help"]
