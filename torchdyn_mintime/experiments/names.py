"""The names of tasks and methods, with a line on each. Imports nothing, so that ``--help`` is fast."""

__all__ = ["FIGURES", "FLOW_METHODS", "METHODS", "SAMPLER_METHODS", "SAMPLER_TASKS", "TABLES", "TASKS"]

TASKS = {
    "moons": "two moons",
    "moons-augmented": "two moons, one zero added",
    "annuli": "concentric annuli",
    "annuli-adaptive": "concentric annuli, adaptive solver",
    "digits": "handwritten digits",
    "mnist": "MNIST",
    "fashion-mnist": "Fashion-MNIST",
    "mnist-cpu": "MNIST, 10,000 images, an encoder of one patch convolution",
    "fashion-mnist-cpu": "Fashion-MNIST, 10,000 images, an encoder of one patch convolution",
    "cifar10-cpu": "CIFAR-10, 10,000 images, an encoder of one patch convolution",
    "cifar10": "CIFAR-10",
    "flow-moons": "a flow on two moons",
    "flow-circles": "a flow on two circles",
    "flow-tutorial": "torchdyn's tutorial on continuous normalizing flows",
}
"""Titles, as printed."""

METHODS = {
    "vanilla": "the NeuralODE on the whole interval, through a span with t_f frozen",
    "vanilla:STEPS": "vanilla with so many equal steps of rk4",
    "torchdyn": "the same by torchdyn's own NeuralODE, without a span",
    "torchdyn:STEPS": "torchdyn's own NeuralODE with so many equal steps of its rk4",
    "minimum-time": "t_f learned, with a price of time on the loss, eq. (13)",
    "target": "minimum-time, with the price found for a target loss",
    "convergence-rate": "Algorithm 2: the Lyapunov loss on [0, .05], then growth of t_f until the target",
    "convergence-rate-patient": "Algorithm 2, which grows when the loss has not improved for three looks",
    "convergence-rate-longer": "Algorithm 2 from [0, .1], as the paper's code has it on two moons",
    "growth": "growth of t_f from one step, on the terminal loss",
    "pretrained": "the first stage of Algorithm 2 alone",
    "pretrained-longer": "the same, on [0, .1]",
    "combined": "the Lyapunov loss, the terminal loss and the price of time in one stage",
    "combined-paper": "the same, with the paper's lower bound of t_f, where the Lyapunov term has too few points",
    "lyapunov-1": "the Lyapunov loss at the rate 1, t_f frozen",
    "lyapunov-10": "the Lyapunov loss at the rate 10, t_f frozen",
    "lyapunov-20": "the Lyapunov loss at the rate 20, t_f frozen",
    "lyanet": "LyaNet: the Lyapunov loss at states drawn at random, without a solve",
    "steer": "STEER: vanilla, with an end of the interval drawn at random",
    "taynode-2": "TayNODE: vanilla, with the second derivative of the path penalised",
    "taynode-3": "TayNODE: vanilla, with the third derivative of the path penalised",
    "rnode": "RNODE: vanilla, with kinetic energy and Jacobian norm penalised",
    "local-error": "the solver's local error penalised, t_f frozen",
    "srnode": "SRNODE: vanilla, with the stiffness of the field along the path penalised",
    "residual": "one step of Euler, with no look at its error: a residual block",
    "step-doubling": "one step, with its difference to two half steps penalised",
    "shallowest": "search for the fewest evaluations at which the target is met by a true ODE",
    "shallowest-adaptive": "the same search, started from tsit5",
    "skipped": "no ODE: the layers around it alone",
    "default-adaptive": "vanilla with tsit5 at torchdyn's default tolerances",
    "vanilla-adjoint": "vanilla with the adjoint",
    "vanilla-adjoint-adaptive": "vanilla with the adjoint and dopri5",
    "snopt": "SNOpt's second-order update of t_f, with the adjoint",
    "snopt-adaptive": "SNOpt's update of t_f, with the adjoint and dopri5",
    "coordinate-descent": "TO-FLOW: five steps of the network, then one of t_f, with a price of time",
    "minimum-time-learned": "minimum-time in one step of a solver whose four stages are learned too",
    "minimum-time-adjoint": "minimum-time with the adjoint",
}

FLOW_METHODS = {
    "vanilla": "100 steps of rk4, through a span with t_f frozen",
    "vanilla:STEPS": "vanilla with so many equal steps of rk4",
    "torchdyn": "100 steps by torchdyn's own NeuralODE, whose rk4 is of first order where the field depends on time",
    "torchdyn:STEPS": "torchdyn's own NeuralODE with so many equal steps of its rk4",
    "minimum-time": "t_f learned on a template of 12 steps, at a rate of its own",
    "minimum-time-doubling": "the same, with the step-doubling penalty at every fifth iteration",
    "minimum-time-paper": "t_f learned on a template of 100 steps, at the network's rate, as in the paper",
    "default-adaptive": "vanilla with tsit5 at torchdyn's default tolerances",
}
"""Of ``flow-moons`` and ``flow-circles``; ``flow-tutorial`` is trained with vanilla and minimum-time."""

SAMPLER_TASKS = {
    "sampler-moons": "eight gaussians carried to two moons by flow matching, and samplers of few evaluations"
}

SAMPLER_METHODS = {
    "euler": "equal steps of Euler, the field as it is",
    "midpoint": "equal steps of midpoint, the field as it is",
    "fit-solver": "a solver fitted to the field, which stays as it is",
    "compress": "a copy of the field, trained with its solver to the same ends",
}
"""Of ``sampler-moons``; all of them where none are named."""

TABLES = {
    "1": "supervised learning: two moons and concentric annuli",
    "2": "image classification: digits, MNIST, Fashion-MNIST and CIFAR-10, the last three on a CPU's scale too",
    "3": "the combined method, on concentric annuli",
    "4": "against SNOpt, on concentric annuli",
    "5": "adaptive solvers, on concentric annuli",
    "6": "training time saved on MNIST and CIFAR-10",
    "flows": "section 4.2: flows on two moons and two circles",
    "robustness": "accuracy under noise and one-step attacks",
    "precision": "evaluations against solver error, of searches at four tolerances",
}

FIGURES = {
    "1": "annuli: the loss along the flow, and trajectories of vanilla",
    "3": "two moons: trajectories of vanilla and minimum-time",
    "4": "annuli: Lyapunov rates 1, 10 and 20, convergence-rate and minimum-time",
    "5": "MNIST: training and inference time of the peers",
    "6": "flows on two moons, with an animation",
    "7": "two moons: the data",
    "8": "two moons: convergence-rate before and after growth",
    "9": "annuli: the data",
    "10": "annuli: convergence-rate before growth",
    "11": "annuli: convergence-rate after growth",
    "12": "flows on two circles, with an animation",
}
"""Figure 2 is a drawing, in the docs."""
