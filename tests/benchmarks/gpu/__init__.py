"""The service on a GPU, measured in one call: what runs where, what is exact, what a step costs, what is served."""
