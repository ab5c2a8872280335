# SPDX-License-Identifier: MIT
"""The libraries that `bench/train.py` compares, one module each, and the problem they all solve."""
