#!/usr/bin/env bash
# Collect the wheels that benchmarks/gpu.py needs on a GPU machine without a network:
#
#     benchmarks/gpu_wheels.sh wheels
#
# docs/gpu.md says what that machine must have, and what to do there.
set -euo pipefail
if (($# != 1)); then
  echo "usage: benchmarks/gpu_wheels.sh FOLDER" >&2
  exit 2
fi
folder=$(realpath -m "$1")
cd "$(dirname "$0")/.."
if ! git rev-parse --quiet --verify HEAD >/dev/null; then
  echo "gpu_wheels.sh must be in a git checkout: it adds up the size of the tracked files" >&2
  exit 1
fi

packages=(
  trl datasets dill multiprocess xxhash  # trl and what datasets depends on
  cloudpickle                            # reward workers
  sentence-transformers scikit-learn joblib threadpoolctl narwhals  # the part `rank`
)
python=python3
if [[ -x .venv/bin/python ]]; then
  python=.venv/bin/python
fi
# pip download matches --platform exactly, so list every manylinux tag that the machine supports.
platforms=()
for version in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${version}_x86_64")
done
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  "${platforms[@]}" --constraint constraints.txt --dest "$folder" "${packages[@]}"

# The upload to a GPU machine may be limited.
limit_mib=64
bytes=$(
  { git ls-files -z; printf '%s\0' "$folder"/*.whl; } | xargs -0 stat --format %s | awk '{ s += $1 } END { print s }'
)
mib=$(((bytes + 1048575) / 1048576))
echo "$folder: $(ls "$folder"/*.whl | wc -l) wheels; with the repository, $mib MiB"
if ((mib > limit_mib)); then
  echo "gpu_wheels.sh: $mib MiB exceed the limit of $limit_mib MiB" >&2
  exit 1
fi
