"""What the jobs that change weights share: request, text, plan, proof, writing."""
