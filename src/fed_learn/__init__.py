"""fed_learn"""
from fed_learn import kernels
from fed_learn.aggregation import Accumulator, weighted_average
from fed_learn.contribution import *
from fed_learn.model_meta import *
