"""The saga: drives a placed order to confirmed, or undoes everything that was ever attempted for it."""
