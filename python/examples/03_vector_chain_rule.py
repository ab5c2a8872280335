# SPDX-License-Identifier: MIT
"""The vector chain rule, in four cases

Lecture: Detour: Vector Chain Rule

    y = f(u) = f(g(h(x))), u = g(v) = g(h(x)), v = h(x)
    (Jₓ[y])_{mn} = ∂y_m/∂xₙ
    ∂y/∂x = ∂y/∂u ∂u/∂v ∂v/∂x
    ∇ₓy = ∂y/∂u ∂u/∂v ∇ₓv
    ∇ₓy = ∂y/∂u ∇ᵥu Jₓ[v]
    ∇ₓy = ∇ᵤy Jᵥ[u] Jₓ[v]

Four lines for scalars, for a vector x (size D), for vectors x and v (size J), and for vectors x, v and u
(size J′). They are one formula: in the numerator layout Jₓ[v] is a J×D matrix, a gradient is a row, a scalar
is a 1×1 matrix, and the sizes of neighbours fit.
"""

import numpy as np

import chainrule as cr
from differences import gradient
from figures import matrices


def chain(D, J, J_, seed=0):
    """h, g and f as networks of one layer and its σ or tanh, with D, J and J′ numbers between them."""
    h = cr.Sequential(cr.Linear(D, J), cr.Tanh(), seed=seed, dtype="float64")
    g = cr.Sequential(cr.Linear(J, J_), cr.Sigmoid(), seed=seed + 1, dtype="float64")
    f = cr.Sequential(cr.Linear(J_, 1), cr.Tanh(), seed=seed + 2, dtype="float64")
    return h, g, f


def factors(h, g, f, x):
    """∇ᵤy, Jᵥ[u] and Jₓ[v] at x: each factor needs the value that stands before it."""
    v = h(x)
    u = g(v)
    return cr.jacobian(f, u), cr.jacobian(g, v), cr.jacobian(h, x)


CASES = {  # D, J, J′
    "all scalars": (1, 1, 1),
    "x a vector": (5, 1, 1),
    "x, v vectors": (5, 3, 1),
    "x, v, u vectors": (5, 3, 4),
}

print("case             ∇ᵤy  Jᵥ[u]  Jₓ[v]   ∇ₓy   first element of ∇ₓy")
for name, sizes in CASES.items():
    h, g, f = chain(*sizes)
    x = np.linspace(-1, 1, sizes[0]) if sizes[0] > 1 else np.array([0.5])
    product = factors(h, g, f, x)
    row = product[0] @ product[1] @ product[2]
    assert np.allclose(row[0], gradient(lambda x: f(g(h(x)))[0], x), atol=1e-9)
    shapes = ["×".join(map(str, factor.shape)) for factor in (*product, row)]
    print(f"{name:<15}  {shapes[0]:>4}  {shapes[1]:>5}  {shapes[2]:>5}  {shapes[3]:>4}  {row[0, 0]:21.6f}")


def figure() -> str:
    """The last case, cell by cell."""
    h, g, f = chain(*CASES["x, v, u vectors"])
    a, b, c = factors(h, g, f, np.linspace(-1, 1, 5))
    return matrices([("∇ᵤy", a), ("Jᵥ[u]", b), ("Jₓ[v]", c)], ("∇ₓy", a @ b @ c))
