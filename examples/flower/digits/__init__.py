"""A Flower app on scikit-learn's digits: our strategy with handlers, and a model of numpy, torch or Keras."""
