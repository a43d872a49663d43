# peftplan rehearse for macOS, Windows and ARM: Linux on x86-64, the CUDA build of torch, a C compiler. No GPU, no driver.
#
#   docker build --platform linux/amd64 --tag peftplan .
#   docker run --rm --platform linux/amd64 --security-opt seccomp=unconfined --security-opt apparmor=unconfined \
#     --volume "$PWD:/work" peftplan rehearse --gpu rtx-4090 -- python train.py
#
# The two security options let the program's writes go to a scratch layer, which needs user namespaces and mounts.
FROM python:3.12-slim
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev binutils && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir torch transformers peft accelerate bitsandbytes datasets trl
COPY . /peftplan
RUN pip install --no-cache-dir '/peftplan[rehearse]' && python -c "from peftplan.rehearse.card import library; library()"
WORKDIR /work
ENTRYPOINT ["peftplan"]
