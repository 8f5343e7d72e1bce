"""The demo: one small GPT trained in fp32, with autocast and with a plan, side by side."""

from precision_compiler.demo.run import Demo, run_demo

__all__ = ["Demo", "run_demo"]
