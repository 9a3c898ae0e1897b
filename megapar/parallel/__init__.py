"""Who holds what: parameter records, collectives with their duals, parallel layers, gradient reduction."""
