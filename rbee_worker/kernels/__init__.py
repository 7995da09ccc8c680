"""The CPU kernels: a library in C++, and what loads it.

Read ``formats`` first: how weights are stored, and what they are as numbers. ``arguments`` describes tensors to the C++
of ``cpp/``, and ``library`` calls it. ``cpp/abi.h`` is the interface, and ``cpp/linear.h`` the heart of it;
``cpp/attention.h`` and ``cpp/elementwise.h`` are what stands between the linear layers. Where there is no library, or
it does not run, the worker computes with torch alone. ``choice`` tells without torch what will run.
"""
