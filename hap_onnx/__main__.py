"""``python -m hap_onnx`` is the command ``hap-onnx``."""

import sys


def run() -> int:
    """Be the command; Ctrl-C is no error even while the command line itself is loaded."""
    try:
        from hap_onnx.cli import main
    except KeyboardInterrupt:
        return 130
    return main()


if __name__ == "__main__":
    sys.exit(run())
