"""Ready-made evaluators and learners for models of a framework, a module for each.

Nothing is imported here: `fed_learn.integrations.torch` imports torch, `fed_learn.integrations.keras` imports Keras.
"""
