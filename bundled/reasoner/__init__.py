"""Three tasks whose answers need old lines of the reply itself, and the training of a model for them.

`trifleet evaluate` poses the tasks to any model. No model that was trained here ships yet.
"""
