"""Lets no test of made inputs fail because the machine is slow."""

import contextlib

with contextlib.suppress(ModuleNotFoundError):  # tests/gpu run without it too
    from hypothesis import HealthCheck, settings

    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")
