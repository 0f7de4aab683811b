#!/bin/sh
# Run the kernels' tests with a given Triton and PyTorch, in a separate environment.
#     run_with.sh PYTHON FOLDER TRITON TORCH INDEX [pytest arguments]
# PYTHON is an interpreter that has all other packages; TRITON may be "newest"; INDEX may be empty.
set -eu
python=$1 folder=$2 triton=$3 torch=$4 index=$5
shift 5

environment=$folder/triton-$triton-torch-$torch
if [ ! -e "$environment/complete" ]; then
    rm -rf "$environment"
    "$python" -m venv "$environment"
    # All other packages come from the environment of PYTHON.
    site=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/base.pth"
    pip="$environment/bin/python -m pip --disable-pip-version-check install --quiet"
    if [ "$("$python" -c 'import torch; print(torch.__version__.split("+")[0])')" != "$torch" ]; then
        $pip "torch==$torch" ${index:+--extra-index-url "$index"}
    fi
    # Last, in place of the version that PyTorch asks for.
    if [ "$triton" = newest ]; then wanted=triton; else wanted="triton==$triton"; fi
    $pip --upgrade --ignore-installed --no-deps "$wanted"
    touch "$environment/complete"
fi

"$environment/bin/python" -c 'import torch, triton; print("triton", triton.__version__, "torch", torch.__version__)'
TRITON_INTERPRET=1 "$environment/bin/python" -m pytest tests/kernels "$@"
