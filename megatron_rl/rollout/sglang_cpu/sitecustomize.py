"""Prepares every Python process of an SGLang server on a CPU, which imports this module before anything else.

torchvision from the package index is built for CUDA. On a CPU build of torch its compiled operators do not load and its
Python part fails, because it describes two of them. They are declared just before it is imported; nobody calls them. A
build of torch for CUDA loads the operators, and the process would end if they were declared twice.
"""

import sys
from typing import Any


class _BeforeTorchvision:
    library: Any = None  # kept: its declarations go when it does

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        del path, target
        if name == "torchvision" and self.library is None:
            import torch

            if torch.version.cuda is not None:
                return
            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _BeforeTorchvision())
