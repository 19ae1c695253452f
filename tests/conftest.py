"""One thread: the models are tiny, and test processes run side by side."""

import torch

torch.set_num_threads(1)
