"""Federated rounds in a plain Keras loop: three clients, server validation, the best model kept."""

import keras
import numpy as np
from sklearn.datasets import load_digits

import fed_learn as fl
from fed_learn.integrations.keras import KerasEvaluator

keras.utils.set_random_seed(0)
digits = load_digits()
images, labels = (digits.data / 16).astype("float32"), digits.target
validation, *parts = np.split(np.random.default_rng(0).permutation(len(images)), [397, 597, 997])
clients = {f"site-{i}": part for i, part in enumerate(parts, 1)}
layers = [keras.layers.Dense(32), keras.layers.BatchNormalization(), keras.layers.ReLU(), keras.layers.Dense(10)]
model = keras.Sequential([keras.Input((64,)), *layers])
model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))

evaluator = KerasEvaluator(model, (images[validation], labels[validation]))
validator = fl.ServerValidationHandler(evaluator, num_rounds_per_valid=1)
server = fl.FederatedServer(fl.get_weights(model), num_rounds=10, handlers=[validator])
with server.begin() as job:
    for number in range(server.num_rounds):
        job.start_round(number)
        for name, part in clients.items():
            job.send_model(name)
            fl.set_weights(model, job.weights)
            model.fit(images[part], labels[part], batch_size=32, verbose=0)
            job.receive(name, fl.Contribution(name, fl.get_weights(model), len(part), round=number))
        job.aggregate()
        print(f"round {number + 1}: accuracy {job.end_round().metrics['server_validation']:.3f}")
best = job.ctx[fl.ContextKey.BEST_AGGREGATED]
fl.set_weights(model, best.weights)
model.save_weights("best.weights.h5")
print(f"best.weights.h5: round {best.round + 1}, accuracy {best.metric:.3f}")
