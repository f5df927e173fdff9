"""Programs put together and made to run: finding them in a user's files, settings, the processes of a system, and the
doors as a Python caller uses them.

Neighbours use `caller.Caller`, `root.run_root`, `settings.load_settings` and `system.System`.
"""
