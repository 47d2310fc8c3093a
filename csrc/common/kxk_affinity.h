#pragma once
// The K x K work of selective task group updates (Jeong and Yoon 2025): the moving average of inter-task affinity, and affinity
// propagation (Frey and Dueck 2007), which forms groups from it. For the host, where the groups are needed; on another device
// the references of mtlkernels/proximal.py and mtlkernels/grouping/propagation.py run. Row-major float64 arrays, K tasks.

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <vector>

namespace mtlkernels {

/// One visit, in place: `affinity` [K, K] from the losses [K] before and after the step of the `count` tasks in `group`.
/// r_k = (1 - after_k / before_k) / count moves row s of each s in the group towards r_t, or, for two tasks of the group of
/// which one rose and one fell, towards -max(r_t, r_s); its own entry only where r_s >= 0. Nothing moves where a loss was not
/// positive before or a ratio is not finite.
inline void proximal_affinity(double* affinity, const double* before, const double* after, int size, const int64_t* group,
                              int64_t count, double decay) {
  std::vector<double> change(size);
  std::vector<char> usable(size), member(size, 0);
  for (int k = 0; k < size; ++k) {
    change[k] = (1.0 - after[k] / before[k]) / double(count);
    usable[k] = before[k] > 0.0 && before[k] <= DBL_MAX && std::fabs(change[k]) <= DBL_MAX;
  }
  for (int64_t g = 0; g < count; ++g) member[group[g]] = 1;
  for (int64_t g = 0; g < count; ++g) {
    const int64_t s = group[g];
    for (int t = 0; t < size; ++t) {
      double value = change[t];
      bool moves = usable[t];
      if (member[t]) {
        moves = moves && usable[s] && (s != t || value >= 0.0);
        if (value * change[s] < 0.0) value = -std::fmax(value, change[s]);
      }
      double& entry = affinity[s * size + t];
      if (moves) entry = (1.0 - decay) * entry + decay * value;
    }
  }
}

/// The tasks whose effect on themselves was measured: diagonal entry above rounding of its column of `affinity` [K, K].
inline std::vector<int64_t> measured_tasks(const double* affinity, int64_t size) {
  std::vector<int64_t> result;
  for (int64_t t = 0; t < size; ++t) {
    double largest = 0.0;
    for (int64_t s = 0; s < size; ++s) largest = std::fmax(largest, std::fabs(affinity[s * size + t]));
    if (affinity[t * size + t] > DBL_EPSILON * largest) result.push_back(t);
  }
  return result;
}

/// Similarity [n, n] of n measured `tasks`: columns divided by their diagonal entry (`released`: on and above the diagonal
/// only), then the mean with the transpose.
inline std::vector<double> proximal_similarity(const double* affinity, int64_t size, const std::vector<int64_t>& tasks,
                                               bool released) {
  const auto scaled = [=](int64_t s, int64_t t) {
    return released && s > t ? affinity[s * size + t] : affinity[s * size + t] / affinity[t * size + t];
  };
  std::vector<double> result;
  result.reserve(tasks.size() * tasks.size());
  for (const int64_t s : tasks)
    for (const int64_t t : tasks) result.push_back((scaled(s, t) + scaled(t, s)) / 2);
  return result;
}

/// By how much of the largest similarity the first task is a better exemplar than the last: what decides between equal ones.
constexpr double kTie = 1e-12;

/// Affinity propagation on one problem.
class AffinityPropagation {
 public:
  explicit AffinityPropagation(int size)
      : size_(size), similarity_(square()), responsibility_(square()), availability_(square()), sums_(size), exemplar_(size) {}

  /// Clusters `similarity` [K, K] with `preference` in place of its diagonal: labels [K], the exemplar of each task or -1 where
  /// there is none. Returns whether the exemplars stayed the same for `convergence_iter` iterations.
  bool cluster(const double* similarity, double preference, double damping, int64_t max_iter, int64_t convergence_iter,
               int64_t* labels) {
    bool finite = std::fabs(preference) <= DBL_MAX, equal = true;
    double largest = std::fabs(preference);
    const double first = size_ > 1 ? similarity[1] : preference;
    for (int i = 0; i < size_; ++i) {
      for (int k = 0; k < size_; ++k) {
        const double value = i == k ? preference : similarity[i * size_ + k];
        finite = finite && std::fabs(value) <= DBL_MAX;
        equal = equal && (i == k || value == first);
        similarity_[i * size_ + k] = value;
        largest = std::fmax(largest, std::fabs(value));
      }
    }
    for (int i = 0; i < size_; ++i) labels[i] = finite && equal ? (preference > first ? i : 0) : -1;
    if (!finite || equal) return finite;
    for (int i = 0; i < size_; ++i) {
      for (int k = 0; k < size_; ++k) similarity_[i * size_ + k] -= kTie * largest * (double(k) / size_);
    }
    bool converged = false;
    std::fill(responsibility_.begin(), responsibility_.end(), 0.0);
    std::fill(availability_.begin(), availability_.end(), 0.0);
    std::fill(exemplar_.begin(), exemplar_.end(), char(2));  // neither yes nor no: the first iteration is a change
    int64_t unchanged = 0;
    for (int64_t iteration = 0; iteration < max_iter && !converged; ++iteration) {
      pass_messages(damping);
      unchanged = update_exemplars() ? 1 : unchanged + 1;
      converged = iteration >= convergence_iter && unchanged >= convergence_iter && any_exemplar();
    }
    if (any_exemplar()) assign(labels);
    return converged;
  }

 private:
  size_t square() const { return size_t(size_) * size_; }

  /// R(i,k) <- S(i,k) - max_{k' != k} (A(i,k') + S(i,k')); A(i,k) <- min(0, R(k,k) + sum_{i' not i, k} max(0, R(i',k)));
  /// A(k,k) <- sum_{i' != k} max(0, R(i',k)); each damped.
  void pass_messages(double damping) {
    std::fill(sums_.begin(), sums_.end(), 0.0);
    for (int i = 0; i < size_; ++i) {
      const double* similarity = &similarity_[size_t(i) * size_];
      const double* availability = &availability_[size_t(i) * size_];
      double* responsibility = &responsibility_[size_t(i) * size_];
      double best = -INFINITY, second = -INFINITY;
      int at = 0;
      for (int k = 0; k < size_; ++k) {
        const double value = availability[k] + similarity[k];
        second = value > best ? best : value > second ? value : second;
        at = value > best ? k : at;
        best = value > best ? value : best;
      }
      const double kept = damping * responsibility[at] + (1 - damping) * (similarity[at] - second);
      for (int k = 0; k < size_; ++k) {
        responsibility[k] = damping * responsibility[k] + (1 - damping) * (similarity[k] - best);
      }
      responsibility[at] = kept;
      const double own = responsibility[i], before = sums_[i];
      for (int k = 0; k < size_; ++k) sums_[k] += responsibility[k] > 0.0 ? responsibility[k] : 0.0;
      sums_[i] = before + own;
    }
    for (int i = 0; i < size_; ++i) {
      const double* responsibility = &responsibility_[size_t(i) * size_];
      double* availability = &availability_[size_t(i) * size_];
      const double own = damping * availability[i] + (1 - damping) * (sums_[i] - responsibility[i]);
      for (int k = 0; k < size_; ++k) {
        const double sum = sums_[k] - (responsibility[k] > 0.0 ? responsibility[k] : 0.0);
        availability[k] = damping * availability[k] + (1 - damping) * (sum < 0.0 ? sum : 0.0);
      }
      availability[i] = own;
    }
  }

  bool update_exemplars() {
    bool changed = false;
    for (int k = 0; k < size_; ++k) {
      const char is = availability_[size_t(k) * size_ + k] + responsibility_[size_t(k) * size_ + k] > 0.0;
      changed = changed || is != exemplar_[k];
      exemplar_[k] = is;
    }
    return changed;
  }

  bool any_exemplar() const {
    for (const char is : exemplar_) {
      if (is == 1) return true;
    }
    return false;
  }

  /// Every task to its most similar exemplar, then the exemplar of each cluster to the member with the largest sum of
  /// similarities to it, and every task again.
  void assign(int64_t* labels) {
    to_nearest(labels);
    std::vector<char> refined(size_, 0);
    for (int exemplar = 0; exemplar < size_; ++exemplar) {
      if (!exemplar_[exemplar]) continue;
      double best = -INFINITY;
      int at = exemplar;
      for (int j = 0; j < size_; ++j) {
        if (labels[j] != exemplar) continue;
        double sum = 0.0;
        for (int i = 0; i < size_; ++i) sum += labels[i] == exemplar ? similarity_[size_t(i) * size_ + j] : 0.0;
        if (sum > best) best = sum, at = j;
      }
      refined[at] = 1;
    }
    exemplar_ = refined;
    to_nearest(labels);
  }

  void to_nearest(int64_t* labels) const {
    for (int i = 0; i < size_; ++i) {
      double best = -INFINITY;
      for (int k = 0; k < size_; ++k) {
        if (exemplar_[k] && similarity_[size_t(i) * size_ + k] > best) {
          best = similarity_[size_t(i) * size_ + k];
          labels[i] = k;
        }
      }
      if (exemplar_[i]) labels[i] = i;
    }
  }

  int size_;
  std::vector<double> similarity_, responsibility_, availability_, sums_;
  std::vector<char> exemplar_;
};

}  // namespace mtlkernels
