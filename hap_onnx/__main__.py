"""``python -m hap_onnx`` is the command ``hap-onnx``."""

import sys

from hap_onnx.cli import main

if __name__ == "__main__":
    sys.exit(main())
