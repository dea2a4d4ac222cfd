"""What training will need and how fast it will be, found out without running it."""

from resnet_bk.planner.module import plan

__all__ = ["plan"]
