"""What all tests share."""

from hypothesis import HealthCheck, settings

# Tests share the machine with engines and other tests: how long an example takes there says nothing.
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")
