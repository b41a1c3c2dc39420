"""Instruction families. Each module offers `decode(instr, kernel)`: a closure on a Batch, or None
for foreign names.
"""
