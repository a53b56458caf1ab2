"""Federated rounds in a plain torch loop: three clients, server validation, the best model kept."""

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split

import fed_learn as fl
from fed_learn.integrations.torch import TorchEvaluator

torch.manual_seed(0)
digits = load_digits()
data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
validation, *parts = random_split(data, [397, 200, 400, 800])
clients = {f"site-{i}": part for i, part in enumerate(parts, 1)}
model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Linear(32, 10))

validator = fl.ServerValidationHandler(TorchEvaluator(model, validation), num_rounds_per_valid=1)
server = fl.FederatedServer(fl.get_weights(model), num_rounds=10, handlers=[validator])
with server.begin() as job:
    for number in range(server.num_rounds):
        job.start_round(number)
        for name, part in clients.items():
            job.send_model(name)
            fl.set_weights(model, job.weights)
            optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
            for images, labels in DataLoader(part, 32, shuffle=True):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(images), labels).backward()
                optimizer.step()
            job.receive(name, fl.Contribution(name, fl.get_weights(model), len(part), round=number))
        job.aggregate()
        print(f"round {number + 1}: accuracy {job.end_round().metrics['server_validation']:.3f}")
best = job.ctx[fl.ContextKey.BEST_AGGREGATED]
torch.save(fl.set_weights(model, best.weights).state_dict(), "best.pt")
print(f"best.pt: round {best.round + 1}, accuracy {best.metric:.3f}")
