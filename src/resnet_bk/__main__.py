"""``python -m resnet_bk`` is the command ``resnet-bk``."""

import sys

from resnet_bk.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
