"""What a run has around its steps: its context, signals, a watchdog, metrics and alarms."""
