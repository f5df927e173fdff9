"""The room for values and rules: what a program, a variable, an event and an error are.

Nothing here performs I/O: no socket, no file, no clock, no environment. The other rooms act; this one
decides and describes, so that all of it can be tested with plain calls and replayed from a log. Import
the modules you need (`from dspex.core.program import Program`); this file loads none of them, so that a
command which needs little starts quickly.
"""
