#!/usr/bin/env bash
# What the GitHub Action does, for any other CI: compress, keep the work and the report, end with hap-onnx's exit code.
#
#   MODEL=model.onnx DATA=calib.npz bash compress.sh --keep-macs 0.5 --max-drop 0.01
#
# Keep the folder HAP_WORK from run to run (GitLab: cache, Jenkins: the workspace): a run with the same model and
# data goes on from what is there. The page for people is hap-onnx/summary.md, the figures are hap-onnx/report.json.
set -uo pipefail
MODEL="${MODEL:?the ONNX model to compress}"
DATA="${DATA:?representative inputs, an .npz file or a folder}"
OUTPUT="${OUTPUT:-hap-onnx/model.onnx}"
HAP_WORK="${HAP_WORK:-.hap-onnx}"

mkdir -p hap-onnx
hap-onnx compress --data="$DATA" --output="$OUTPUT" --work-dir="$HAP_WORK" \
    --report=hap-onnx/report.json --summary=hap-onnx/summary.md "$@" -- "$MODEL"
code=$?

case $code in
0) echo "written: $OUTPUT" ;;
3) echo "refused: a budget or a gate is not met, see hap-onnx/summary.md" ;;
*) echo "hap-onnx ended with exit code $code" ;;
esac
exit $code
