"""Measures mixmoe beside its rivals on one GPU, in one run, under one flush.

    python -m benchmarks --rivals all --shape dsv3_tp8        (or: mixmoe bench ...)

shapes -> routing -> operands -> case        what is computed
counts -> roofs                              what it costs at least
registry -> ours, rivals/*                   who computes it: one decorated function per stage
reference                                    how exact the result is, against float64
run -> worker -> results -> report, plots    the measurement and what is shown of it
"""
