"""A fleet in virtual time: the coordinator's own code in front of simulated replicas, against other ways to route.

`trace.py` says what arrives and on which fleet, `blocks.py` and `replica.py` are the model of one engine, `routers.py`
the ways to choose a replica, `simulation.py` the clock, `report.py` what is made of the outcomes.
"""
