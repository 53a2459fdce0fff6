"""An unmodified model -> one joint graph of forward, loss and backward."""
