"""An oracle for the tests of exports: mixed-integer programs by HiGHS that share no code with what they check."""

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

from flowverify.network import Network
from tests.contracts import incidence

OPTIONS = {"mip_rel_gap": 1e-9, "time_limit": 60}


def dense_layers(network):
    """The network as matrices between ReLUs, by probing: [(W, b), ...] in float64."""
    layers, start, shape = [], 0, network.input_shape
    operations = [node.operation for node in network.double().nodes]
    cuts = [k for k, operation in enumerate(operations) if isinstance(operation, nn.ReLU)] + [len(operations)]
    for cut in cuts:
        part = nn.Sequential(*operations[start:cut])
        size = int(np.prod(shape))
        with torch.no_grad():
            bias = part(torch.zeros(1, *shape, dtype=torch.float64))
            matrix = part(torch.eye(size, dtype=torch.float64).reshape(size, *shape)) - bias
        layers.append((matrix.flatten(1).T.numpy(), bias.flatten().numpy()))
        start, shape = cut + 1, tuple(bias.shape[1:])
    return layers


class Program:
    """Variables [p, q, z_1, s_1, ..., extra] with the network's ReLUs; rows are added one by one."""

    def __init__(self, network, image, positivity, most):
        self.layers = dense_layers(network)
        self.matrix = incidence(*network.input_shape).toarray()
        self.mu = image.double().flatten().numpy()
        self.edges = self.matrix.shape[1]
        self.low, self.high, self.integral = [0.0] * (2 * self.edges), [most] * (2 * self.edges), [0] * (2 * self.edges)
        self.rows, self.least, self.greatest = [], [], []
        flow = np.concatenate([self.matrix, -self.matrix], 1)
        self.pixels = [(dict(enumerate(flow[i])), self.mu[i]) for i in range(len(self.mu))]
        self.budget = dict.fromkeys(range(2 * self.edges), 1.0)
        if positivity:
            for terms, constant in self.pixels:
                self.require(terms, -constant, np.inf)
        values = self.pixels
        reach = (self.mu - most, self.mu + most)
        if positivity:
            reach = (np.zeros_like(self.mu), np.full_like(self.mu, self.mu.sum()))
        for depth, (weight, bias) in enumerate(self.layers):
            middle, radius = (reach[0] + reach[1]) / 2, (reach[1] - reach[0]) / 2
            low, high = weight @ middle + bias - abs(weight) @ radius, weight @ middle + bias + abs(weight) @ radius
            affine = [self.combine(row, values, b) for row, b in zip(weight, bias, strict=True)]
            if depth == len(self.layers) - 1:
                self.outputs = affine
            else:
                values = [self.relu(*item) for item in zip(affine, low, high, strict=True)]
                reach = (np.maximum(low, 0), np.maximum(high, 0))

    def variable(self, low, high, integral=0):
        self.low.append(low), self.high.append(high), self.integral.append(integral)
        return len(self.low) - 1

    def require(self, terms, least, greatest):
        self.rows.append(terms), self.least.append(least), self.greatest.append(greatest)

    def combine(self, coefficients, values, constant=0.0):
        terms, total = {}, constant
        for coefficient, (own, shift) in zip(coefficients, values, strict=True):
            total += coefficient * shift
            for k, value in own.items():
                terms[k] = terms.get(k, 0.0) + coefficient * value
        return terms, total

    def relu(self, value, low, high):
        terms, constant = value
        z, s = self.variable(0, max(high, 0)), self.variable(0, 1, 1)
        self.require({z: 1.0, **{k: -v for k, v in terms.items()}}, constant, np.inf)
        self.require({z: 1.0, s: -min(low, 0), **{k: -v for k, v in terms.items()}}, -np.inf, constant - min(low, 0))
        self.require({z: 1.0, s: -max(high, 0)}, -np.inf, 0)
        return {z: 1.0}, 0.0

    def minimise(self, terms):
        cost = np.zeros(len(self.low))
        for k, value in terms.items():
            cost[k] = value
        rows = np.zeros((len(self.rows), len(self.low)))
        for i, row in enumerate(self.rows):
            for k, value in row.items():
                rows[i, k] = value
        limits = LinearConstraint(rows, self.least, self.greatest)
        bounds = Bounds(np.array(self.low), np.array(self.high))
        return milp(cost, integrality=self.integral, bounds=bounds, constraints=limits, options=OPTIONS)


def least_misclassifying_budget(network, image, label, positivity=True):
    """Exact: the least sum(p + q) with some f_t >= f_label; infinite if there is none."""
    most = float(image.sum()) * (image.shape[-1] + image.shape[-2] - 2)
    found = []
    for target in range(network.num_classes):
        if target != label:
            program = Program(network, image, positivity, most)
            row = np.zeros(network.num_classes)
            row[label], row[target] = 1, -1
            terms, constant = program.combine(row, program.outputs)
            program.require(terms, -np.inf, -constant)
            solution = program.minimise(program.budget)
            if solution.status == 0:
                found.append(solution.fun)
            else:
                assert solution.status == 2, solution.message
    return min(found, default=float("inf"))


def least_margin(network, image, label, target, budget, *, penalty_weight=None):
    """Exact: min of f_label - f_target over the ball, or with a weight that of the penalised margin over the box."""
    program = Program(network, image, penalty_weight is None, budget)
    row = np.zeros(network.num_classes)
    row[label], row[target] = 1, -1
    terms, constant = program.combine(row, program.outputs)
    cost = dict(terms)
    if penalty_weight is None:
        program.require(program.budget, -np.inf, budget)
    else:
        excess = program.variable(0, np.inf)
        program.require({excess: 1.0, **{k: -v for k, v in program.budget.items()}}, -budget, np.inf)
        negative = []
        for own, shift in program.pixels:
            part = program.variable(0, np.inf)
            program.require({part: 1.0, **own}, -shift, np.inf)
            negative.append(part)
        cost |= dict.fromkeys([excess, *negative], penalty_weight)
    solution = program.minimise(cost)
    assert solution.status == 0, solution.message
    return solution.fun + constant


def small_network(seed, kind):
    """Linear or Conv first layer on 4x4 images, one or two hidden layers, three classes."""
    torch.manual_seed(seed)
    if kind == "linear":
        modules = [nn.Flatten(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)]
    else:
        modules = [nn.Conv2d(1, 1, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3)]
    for module in modules:
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.data.mul_(2.0)
    return Network.sequential((1, 4, 4), modules)


def small_image(seed):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(1, 4, 4, generator=generator) * (torch.rand(1, 4, 4, generator=generator) < 0.6)
    image[0, 1, 1] += 0.5
    return image
