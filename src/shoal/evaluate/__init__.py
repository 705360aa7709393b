"""How good are the answers: text metrics and the tasks that they are measured on."""
