"""The room for choosing values: searching a program's space, studies of many trials, prompts that improve themselves.

It is empty in this version. What it will need from its neighbours exists: a program's `space()`, assignments that are
immutable and known by their hash, and outcomes in the log.
"""
