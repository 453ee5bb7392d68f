"""What goes on the loss: penalties over the spans of a model, the Lyapunov terms and their potentials."""
