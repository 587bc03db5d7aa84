"""Contains what surrounds the steps of a run: its context, signals, a watchdog, metrics and alarms."""
