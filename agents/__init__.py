"""The life of processes: the worker that turns a delivered task into one commit, the agent around it, the watch that
keeps its beats going, the registrar that opens doors, and the supervisor that starts them all again when they die.

Neighbours use `agent.agent_main`, `registrar.registrar_main` and `supervisor.Supervisor`.
"""
