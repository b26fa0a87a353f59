from .base import Balancer as Balancer, read_balancer as read_balancer
