"""A Flower app on scikit-learn's digits: three nodes, our strategy with handlers, a torch or a Keras model."""
