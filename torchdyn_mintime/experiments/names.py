"""The names of tasks, methods, tables and figures, with a line on each. Imports nothing, so that ``--help`` is fast."""

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
    "vanilla": "the NeuralODE on the whole interval, in a span whose t_f is frozen",
    "vanilla:STEPS": "vanilla with so many equal steps of rk4",
    "torchdyn": "the same by torchdyn's own NeuralODE, without a span",
    "torchdyn:STEPS": "torchdyn's own NeuralODE with so many equal steps of its rk4",
    "minimum-time": "t_f is learned, with a price of time on the loss, eq. (13)",
    "target": "minimum-time, where the price is found for a target loss",
    "convergence-rate": "Algorithm 2: the Lyapunov loss on [0, .05], then t_f grows until the target loss",
    "convergence-rate-patient": "Algorithm 2, where t_f grows when the loss has not improved for three checks",
    "convergence-rate-longer": "Algorithm 2 from [0, .1], as in the paper's code for two moons",
    "growth": "t_f grows from one step until the terminal loss meets the target",
    "pretrained": "only the first stage of Algorithm 2",
    "pretrained-longer": "the same, on [0, .1]",
    "combined": "the Lyapunov loss, the terminal loss and the price of time in one stage",
    "combined-paper": "the same with the paper's lower bound of t_f, where the Lyapunov term has too few points",
    "lyapunov-1": "the Lyapunov loss with the rate 1, t_f frozen",
    "lyapunov-10": "the Lyapunov loss with the rate 10, t_f frozen",
    "lyapunov-20": "the Lyapunov loss with the rate 20, t_f frozen",
    "lyanet": "LyaNet: the Lyapunov loss at random states, without a solve",
    "steer": "STEER: vanilla, with a random end of the interval",
    "taynode-2": "TayNODE: vanilla, with a penalty on the second derivative of the path",
    "taynode-3": "TayNODE: vanilla, with a penalty on the third derivative of the path",
    "rnode": "RNODE: vanilla, with penalties on kinetic energy and Jacobian norm",
    "local-error": "vanilla, with a penalty on the solver's local error",
    "srnode": "SRNODE: vanilla, with a penalty on the stiffness of the field along the path",
    "residual": "one step of Euler, whatever its error: a residual block",
    "step-doubling": "one step, with a penalty on its difference to two half steps",
    "shallowest": "the search for the fewest evaluations at which a true ODE meets the target loss",
    "shallowest-adaptive": "the same search, started from tsit5",
    "skipped": "no ODE: only the layers around it",
    "default-adaptive": "vanilla with tsit5 at torchdyn's default tolerances",
    "vanilla-adjoint": "vanilla with the adjoint",
    "vanilla-adjoint-adaptive": "vanilla with the adjoint and dopri5",
    "snopt": "SNOpt's second-order update of t_f, with the adjoint",
    "snopt-adaptive": "SNOpt's update of t_f, with the adjoint and dopri5",
    "coordinate-descent": "TO-FLOW: five steps of the network, then one of t_f, with a price of time",
    "minimum-time-learned": "minimum-time in one step of a solver of four stages, which is learned too",
    "minimum-time-adjoint": "minimum-time with the adjoint",
}

FLOW_METHODS = {
    "vanilla": "100 steps of rk4, in a span whose t_f is frozen",
    "vanilla:STEPS": "vanilla with so many equal steps of rk4",
    "torchdyn": "100 steps by torchdyn's own NeuralODE, whose rk4 has order 1 for a field that depends on time",
    "torchdyn:STEPS": "torchdyn's own NeuralODE with so many equal steps of its rk4",
    "minimum-time": "t_f is learned on a template of 12 steps, at a learning rate of its own",
    "minimum-time-doubling": "the same, with the step-doubling penalty at every fifth iteration",
    "minimum-time-paper": "t_f is learned on a template of 100 steps, at the network's learning rate, as in the paper",
    "shallowest": "the search for the fewest evaluations, at a solver error of at most .01",
    "default-adaptive": "vanilla with tsit5 at torchdyn's default tolerances",
}
"""The methods of ``flow-moons`` and ``flow-circles``. ``flow-tutorial`` is trained with vanilla and minimum-time."""

SAMPLER_TASKS = {
    "sampler-moons": "samplers of few evaluations, for a field of flow matching from eight gaussians to two moons"
}

SAMPLER_METHODS = {
    "euler": "equal steps of Euler, with the field as it is",
    "midpoint": "equal steps of midpoint, with the field as it is",
    "fit-solver": "a solver fitted to the field, which stays as it is",
    "compress": "a copy of the field, trained with its solver to the same ends",
}
"""The methods of ``sampler-moons``; the default is all of them."""

TABLES = {
    "1": "supervised learning: two moons and concentric annuli",
    "2": "image classification: digits, MNIST, Fashion-MNIST and CIFAR-10, the last three also small enough for a CPU",
    "3": "the combined method, on concentric annuli",
    "4": "against SNOpt, on concentric annuli",
    "5": "adaptive solvers, on concentric annuli",
    "6": "training time saved on MNIST and CIFAR-10",
    "flows": "section 4.2: flows on two moons and two circles",
    "peers": "other methods on two moons and concentric annuli: LyaNet, STEER, TayNODE, RNODE, SRNODE, TO-FLOW",
    "robustness": "accuracy under noise and one-step attacks",
    "precision": "evaluations against solver error, of searches at four tolerances",
}

FIGURES = {
    "1": "annuli: the loss along the flow, and trajectories of vanilla",
    "3": "two moons: trajectories of vanilla and minimum-time",
    "4": "annuli: Lyapunov rates 1, 10 and 20, convergence-rate and minimum-time",
    "5": "MNIST: training time, inference time and accuracy of minimum-time, the search and peers",
    "6": "flows on two moons, with an animation",
    "7": "two moons: the data",
    "8": "two moons: convergence-rate before and after growth",
    "9": "annuli: the data",
    "10": "annuli: convergence-rate before growth",
    "11": "annuli: convergence-rate after growth",
    "12": "flows on two circles, with an animation",
}
"""Figure 2 is a drawing, in the docs."""
