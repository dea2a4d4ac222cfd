import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent / "ops"))
torch.set_num_threads(2)
